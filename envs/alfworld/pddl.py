"""Parses the PDDL problem of an ALFWorld game, and works out what its goal comes down to in that game."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

# A formula is nested tuples: ("and", f, g), ("not", f), ("exists", ("?r", "-", "receptacle"), f), ("isclean", "?o").
Formula = tuple
# Once grounded, it has no variables and no static predicates left, and may be just True or False.
Grounded = tuple | bool

# The argument types of every predicate of the domain, and the predicates that an action can change.
_SIGNATURES = """
atlocation agent location; receptacleatlocation receptacle location; objectatlocation object location;
openable receptacle; opened receptacle; checked object; examined location; full receptacle;
inreceptacle object receptacle; wasinreceptacle object receptacle;
isreceptacleobject object; inreceptacleobject object object; isreceptacleobjectfull object;
receptacletype receptacle rtype; objecttype object otype; cancontain rtype otype;
holds agent object; holdsany agent; holdsanyreceptacleobject agent; pickupable object; moveable object;
cleanable object; isclean object; heatable object; ishot object; coolable object; iscool object;
toggleable object; ison object; istoggled object; sliceable object; issliced object
"""
SIGNATURES = {name: types for name, *types in map(str.split, _SIGNATURES.split(";"))}
MARKS = frozenset({"isclean", "ishot", "iscool", "ison", "istoggled", "issliced"})
MOST_TEXT = 4_000_000  # characters of a problem; alfworld's have some hundred thousand
MOST_FACTS = 100_000  # alfworld's have some thousand
MOST_WORK = 200_000  # facts and cases looked at to work out a goal
DYNAMIC = MARKS | {"atlocation", "objectatlocation", "opened", "inreceptacle", "holds", "holdsany", "checked"}


@dataclass(frozen=True)
class Problem:
    types: dict[str, str]  # every declared name -> its type
    facts: dict[str, list[tuple[str, ...]]]  # predicate -> argument tuples, in the order of the file
    goal: Formula
    work: Counter = field(default_factory=Counter, compare=False)  # spent on working out the goal

    def spend(self, amount: int) -> None:
        """Raises ValueError where a goal takes too long."""
        self.work["goal"] += amount
        if self.work["goal"] > MOST_WORK:
            raise ValueError(f"its goal needs more than {MOST_WORK} comparisons to be worked out")


@dataclass(frozen=True)
class Goal:
    """What a goal asks for, in words: `count` things of kind `object`, each `needs`, brought to kind `receptacle`.

    Where there is a `lamp` instead, the object is to be held beside that lamp, turned on.
    """

    object: str
    receptacle: str = ""
    lamp: str = ""
    count: int = 1
    needs: frozenset[str] = frozenset()  # of "isclean", "ishot", "iscool", "issliced"


# ---- problem ----


def parse_problem(text: str) -> Problem:
    """Parse a PDDL problem. Names become lower case, as PDDL knows no other. ValueError says what is wrong."""
    if len(text) > MOST_TEXT or text.count("(") > MOST_FACTS:
        raise ValueError(f"its pddl_problem has more than {MOST_FACTS} facts or {MOST_TEXT} characters")
    parts = re.split(r"\(:(\w+)", re.sub(r";.*", "", text).lower())
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    if missing := {"objects", "init", "goal"} - sections.keys():
        raise ValueError(f"its pddl_problem has no {', '.join(sorted(missing))}")
    types = parse_typed(sections["objects"].replace(")", " ").split())
    facts: dict[str, list[tuple[str, ...]]] = {name: [] for name in SIGNATURES}
    for inner in re.findall(r"\(([^()]*)\)", sections["init"]):
        predicate, *names = inner.split()
        if predicate in ("totalcost", "total-cost", "distance"):
            continue  # numbers, which no rule looks at
        expected = SIGNATURES.get(predicate, ())
        found = [types[name] for name in names if name in types]
        if not len(found) == len(names) == len(expected) or not all(map(is_a, found, expected)):
            raise ValueError(f"its pddl_problem states ({inner}), which fits no predicate of the domain")
        facts[predicate].append(tuple(names))
    return Problem(types, facts, parse_formula(sections["goal"]))


def parse_typed(tokens: list[str]) -> dict[str, str]:
    """["a", "b", "-", "agent"] -> {"a": "agent", "b": "agent"}; what has no type is an object."""
    types, waiting = {}, []
    rest = iter(tokens)
    for token in rest:
        if token == "-":
            types.update(dict.fromkeys(waiting, next(rest, "object")))
            waiting = []
        else:
            waiting.append(token)
    return types | dict.fromkeys(waiting, "object")


def is_a(type_: str, expected: str) -> bool:
    return expected in (type_, "object")  # the domain's `object` is PDDL's root type: everything is one


def parse_formula(text: str) -> Formula:
    """The first parenthesised expression of a text, as nested tuples."""
    stack: list[list] = [[]]
    for token in re.findall(r"[()]|[^\s()]+", text):
        if token == "(":
            stack.append([])
        elif token != ")":
            stack[-1].append(token)
        elif len(stack) > 1:
            done = tuple(stack.pop())
            stack[-1].append(done)
            if len(stack) == 1:
                return done
    raise ValueError("the goal of its pddl_problem is cut off")


# ---- goal ----


def ground(formula: Formula, problem: Problem, binding: dict[str, str] | None = None) -> Grounded:
    """Put every possible thing in place of the variables and work out what never changes."""
    binding = binding or {}
    problem.spend(1)
    if not formula:
        return True
    head, *rest = formula
    if head in ("and", "or"):
        return join(head, (ground(part, problem, binding) for part in rest))
    if head == "not":
        inner = ground(rest[0], problem, binding)
        return not inner if isinstance(inner, bool) else ("not", inner)
    if head == "imply":
        return ground(("or", ("not", rest[0]), rest[1]), problem, binding)
    if head == "exists":
        variables, body = parse_typed(rest[0]), rest[1]
        while body and body[0] == "exists" and not variables.keys() & set(body[1]):
            variables, body = variables | parse_typed(body[1]), body[2]  # bound together, the search is far shorter
        conditions = body[1:] if body and body[0] == "and" else (body,)
        return join("or", (ground(body, problem, b) for b in bindings(variables, conditions, problem, binding)))
    if head == "forall":
        cases = bindings(parse_typed(rest[0]), (), problem, binding)
        return join("and", (ground(rest[1], problem, b) for b in cases))
    names = tuple(binding.get(name, name) for name in rest)
    if head == "=":
        return names[0] == names[1]
    if head not in SIGNATURES or head == "checked":
        raise ValueError(f"its goal asks for ({' '.join(formula)}), which this engine doesn't keep")
    if len(names) != len(SIGNATURES[head]):
        raise ValueError(f"its goal asks for ({' '.join(formula)}), which fits no predicate of the domain")
    if head in DYNAMIC:
        return (head, *names)
    problem.spend(len(problem.facts[head]))
    return names in problem.facts[head]


def join(head: str, parts: Iterator[Grounded]) -> Grounded:
    """A conjunction or disjunction of grounded parts, as short as it gets."""
    decisive = head == "or"
    kept: dict[tuple, None] = {}  # in order
    for part in parts:
        if part is decisive:
            return decisive
        if not isinstance(part, bool):
            kept[part] = None
    return next(iter(kept)) if len(kept) == 1 else (head, *kept) if kept else not decisive


def bindings(variables: dict[str, str], conditions: tuple, problem: Problem, bound: dict[str, str]) -> Iterator[dict]:
    """Every way to bind `variables` (name -> type) that the facts among `conditions` allow, fewest choices first."""
    if not variables:
        yield bound
        return
    choices = None
    for predicate, *terms in filter(None, conditions):
        if predicate in SIGNATURES and predicate not in DYNAMIC and variables.keys() & set(terms):
            problem.spend(len(problem.facts[predicate]))
            matches = [found for fact in problem.facts[predicate] if (found := match(terms, fact, variables, bound))]
            matches = [m for m in matches if all(is_a(problem.types[n], variables[v]) for v, n in m.items())]
            choices = matches if choices is None or len(matches) < len(choices) else choices
    if choices is None:
        name, type_ = next(iter(variables.items()))
        problem.spend(len(problem.types))
        choices = [{name: thing} for thing, kind in problem.types.items() if is_a(kind, type_)]
    for choice in choices:
        others = {name: type_ for name, type_ in variables.items() if name not in choice}
        yield from bindings(others, conditions, problem, bound | choice)


def match(terms: list[str], fact: tuple[str, ...], variables: dict[str, str], bound: dict[str, str]) -> dict | None:
    """What the still open variables must be for `terms` to be this fact; None where they can't."""
    found: dict[str, str] = {}
    for term, name in zip(terms, fact, strict=True):
        if found.setdefault(term, name) != name if term in variables else bound.get(term, term) != name:
            return None
    return found


def summarise(formula: Formula) -> Goal:
    """Read off a goal (not grounded) what kinds of things it speaks of."""
    atoms = list(positive_atoms(formula))
    lamps = {names[0] for head, *names in atoms if head == "istoggled"}
    kinds = [(names[0], names[1].removesuffix("type")) for head, *names in atoms if head == "objecttype"]
    wanted = [kind for variable, kind in kinds if variable not in lamps]
    return Goal(
        object=wanted[0] if wanted else "",
        receptacle=next((names[1].removesuffix("type") for head, *names in atoms if head == "receptacletype"), ""),
        lamp=next((kind for variable, kind in kinds if variable in lamps), ""),
        count=max(1, len(set(kinds)) - len(lamps)),
        needs=frozenset(atom[0] for atom in atoms) & {"isclean", "ishot", "iscool", "issliced"},
    )


def positive_atoms(formula: Formula) -> Iterator[tuple[str, ...]]:
    if formula and formula[0] in ("and", "or", "exists", "forall"):
        for part in formula[1 + (formula[0] in ("exists", "forall")) :]:
            yield from positive_atoms(part)
    elif formula and formula[0] != "not":
        yield formula
