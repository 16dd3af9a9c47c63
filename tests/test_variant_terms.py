"""What variants put into an advantage or a loss, in hand-computed numbers."""

import random
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import kl_div

from config import variant_of
from data import Batch, Guidance, Route, Skills, Step, Trajectory
from lm.distributions import divergence
from lm.scoring import pack
from tests.settings import laptop
from variants import gigpo, opid_shuffled, rlsd
from variants.gigpo import state_groups, step_relative_advantage
from variants.opid_contrast import other_routes
from variants.rlsd import rescale
from variants.sdar import gated_pull, only_teacher
from variants.sdpo import clipped_ratio, peer_of, transcript, turn_ends
from variants.skill_sd import weighted_k3

NAN = float("nan")
TERMS = {  # (new, old, teacher) -> the term of a method before its weight
    "gated": lambda new, old, teacher: gated_pull(new, teacher, 5.0),
    "ungated": lambda new, old, teacher: gated_pull(new, teacher, 0.0),
    "k3": weighted_k3,
}


@pytest.mark.parametrize(
    ("kind", "expected", "gradient"),
    [
        # Delta_now = 0.2 and -0.4, sigmoid(5 Delta_now) = 0.731059 and 0.119203
        ("gated", [0.146212, -0.047681], [-0.731059, -0.119203]),
        ("ungated", [0.1, -0.2], [-0.5, -0.5]),
        # rho = e^0.1 and 1, k3 = e^0.2 - 1.2 and e^-0.4 - 0.6; d(rho k3)/dnew = rho (k3 + 1 - e^Delta)
        ("k3", [0.023654, 0.070320], [-0.221034, 0.4]),
    ],
)
def test_distillation_by_hand(kind, expected, gradient):
    new = torch.tensor([-1.0, -0.5, -3.0], requires_grad=True)
    old, teacher = torch.tensor([-1.1, -0.5, -2.0]), torch.tensor([-0.8, -0.9, NAN])
    loss = TERMS[kind](new, old, teacher)
    assert torch.allclose(loss, torch.tensor([*expected, 0.0]), atol=1e-5)
    loss.sum().backward()
    assert torch.allclose(new.grad, torch.tensor([*gradient, 0.0]), atol=1e-5)


def test_the_gate_is_one_half_at_beta_zero():
    new, teacher = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -0.1])
    assert torch.equal(gated_pull(new, teacher, 0.0), 0.5 * (teacher - new))
    assert variant_of("grpo+opsd").settings(algo="grpo+opsd").gate_beta == 0
    with pytest.raises(ValueError, match="--gate-beta must be between 0 and 0"):
        variant_of("grpo+opsd").settings(algo="grpo+opsd", gate_beta=5.0)


@pytest.mark.parametrize("kind", ["gated", "ungated", "k3"])
def test_nothing_scored_and_huge_ratios_stay_finite(kind):
    new = torch.tensor([-1.0, -2.0], requires_grad=True)
    TERMS[kind](new, new.detach(), torch.full((2,), NAN)).sum().backward()
    assert new.grad.tolist() == [0, 0]
    far = TERMS[kind](new, torch.tensor([-500.0, 0]), torch.tensor([0.0, -500]))
    assert far.isfinite().all()


def test_each_token_has_one_teacher():
    episode, step = torch.tensor([[1.0, NAN, NAN]]), torch.tensor([[NAN, 2.0, NAN]])
    teacher = lambda **logprobs: only_teacher(Batch([], [], [], {}, torch.ones(1, 3), None, logprobs))
    got = teacher(episode=episode, step=step)
    assert got[0, :2].tolist() == [1, 2]
    assert got[0, 2].isnan()
    with pytest.raises(ValueError, match="two teachers"):
        teacher(episode=episode, step=torch.tensor([[1.0, 2.0, NAN]]))


def test_the_terms_weigh_what_the_release_gives_them_or_what_was_asked_for():
    made = lambda algo, **changes: variant_of(algo).settings(algo=algo, **changes).distill_weight
    weights = {algo: made(algo) for algo in ("sdar", "opsd", "grpo+opsd", "skill-sd")}
    assert weights == {"sdar": 0.01, "opsd": 0.01, "grpo+opsd": 0.01, "skill-sd": 0.001}
    assert made("skill-sd", distill_weight=0.5) == 0.5


# ---- gigpo -----------------------------------------------------------------------------------------------------------


def test_state_groups_are_of_one_task():
    assert state_groups(torch.tensor([0, 0, 1, 0]), ["hall", "bed", "hall", "hall"]).tolist() == [0, 1, 2, 0]


def test_step_relative_advantage_by_hand():
    # Two rollouts start in the hall: one wins 10 after 2 more steps, one loses. G = 0.5^2 * 10 = 2.5, and 0 - 1 = -1
    # (an invalid action): mean 0.75, sample std 3.5 / sqrt(2). The step alone in its state has nothing to compare.
    returns, states = torch.tensor([2.5, 5, 10, -1]), torch.tensor([0, 1, 2, 0])
    assert step_relative_advantage(returns, states, "mean").tolist() == [1.75, 0, 0, -1.75]
    both = step_relative_advantage(returns, states, "mean_std")
    assert torch.allclose(both, torch.tensor([0.707107, 0, 0, -0.707107]), atol=1e-5)


def played(success: bool, *observations: str, slip: bool = False) -> Trajectory:
    """A trajectory; with `slip` its first action is invalid."""
    steps = [Step((), o, [1], [2], "", "", not (slip and t == 0)) for t, o in enumerate(observations)]
    return Trajectory("task", 0, steps, success)


def test_gigpo_adds_the_step_relative_part_to_the_outcome():
    trajectories = [played(True, "hall", "bed"), played(False, "hall", "desk", slip=True)]
    config = gigpo.Settings(algo="gigpo", normalize="mean", gamma=0.5, state_weight=2.0, invalid_penalty=1.0)
    run = SimpleNamespace(config=config, metrics={})
    got = gigpo.advantages(run, Batch(trajectories, [None] * 2, [[(), ()]] * 2, {}, torch.zeros(4, 1), None, {}))
    # A_ep: returns 10 10 -1 0, mean 4.75; G in the hall: 5 and -1, mean 2
    assert got.outcome.tolist() == [5.25 + 2 * 3, 5.25, -5.75 - 2 * 3, -4.75]
    assert got.total[:, 0].tolist() == got.outcome.tolist() and got.skill.isnan().all()
    assert run.metrics == {"advantage/state_group_size": 4 / 3}


def test_a_win_further_off_is_worth_less():
    """The returns of `test_step_relative_advantage_by_hand`, from their trajectories; A_ep: 10 10 10 -1, mean 7.25."""
    trajectories = [played(True, "hall", "bed", "sofa"), played(False, "hall", slip=True)]
    config = gigpo.Settings(algo="gigpo", normalize="mean", gamma=0.5, invalid_penalty=1.0)
    batch = Batch(trajectories, [None] * 2, [[()] * 3, [()]], {}, torch.zeros(4, 1), None, {})
    got = gigpo.advantages(SimpleNamespace(config=config, metrics={}), batch)
    assert got.outcome.tolist() == [2.75 + 1.75, 2.75, 2.75, -8.25 - 1.75]


# ---- rlsd ------------------------------------------------------------------------------------------------------------

floats = st.floats(-100, 100, width=32)


def test_rescale_by_hand():
    outcome, mask = torch.tensor([2.0, -2.0]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    shift = torch.tensor([[0.1, -9.0, 0.0], [0.1, -9.0, 9.0]])
    got = rescale(outcome, shift, mask, mix=0.5, clip=0.2)
    # exp(0.1) = 1.105171, exp(-9) -> 0.8; for the loss exp(-0.1) = 0.904837, exp(9) -> 1.2
    assert torch.allclose(got, torch.tensor([[2.105171, 1.8, 2.0], [-1.904837, -2.2, 0.0]]), atol=1e-5)
    assert torch.equal(rescale(outcome, shift, mask, mix=0.0, clip=0.2), outcome[:, None] * mask)


normal = st.floats(-100, 100, width=32, allow_subnormal=False)  # a tenth of the smallest subnormal number is 0


@given(st.lists(floats, min_size=1, max_size=9), normal, st.floats(0, 1), st.floats(0, 0.9))
def test_rescale_never_turns_a_sign(shifts, outcome, mix, clip):
    outcome, shift = torch.tensor([outcome]), torch.tensor([shifts])
    got = rescale(outcome, shift, torch.ones_like(shift), mix=mix, clip=clip)
    assert (got.sign() == outcome.sign()).all()
    assert (got.abs() <= outcome.abs() * (1 + clip) * 1.001).all()


def test_rlsd_lets_go_of_the_skill_in_a_line():
    """A_ep 2 of a step that its skill praises beyond the bound: 2 (1 - mu + 1.2 mu), mu from 1/2 to 0."""
    played = [Trajectory("t", 0, [Step((), "", [1], [2], "", "", True)], True)]
    scored = {"episode": torch.zeros(1, 1)}
    batch = Batch(played, [None], [[()]], {}, torch.full((1, 1), -9.0), None, scored)

    def of(iteration, **changes) -> float:
        config = rlsd.Settings(algo="rlsd", success_reward=2.0, rlsd_clip=0.2, **changes)
        return rlsd.advantages(SimpleNamespace(config=config, iteration=iteration), batch).total.item()

    assert [of(i) for i in (0, 25, 50, 60)] == pytest.approx([2.2, 2.1, 2, 2], rel=1e-5)
    assert of(1000, rlsd_iterations=0) == pytest.approx(2.2, rel=1e-5)


# ---- sdpo ------------------------------------------------------------------------------------------------------------


def release_loss(student, teacher, new, old, mask, *, alpha, is_clip, topk=None):
    """compute_self_distillation_loss of lasgroup/SDPO (0e6d510, verl/trainer/ppo/core_algos.py), loss_agg_mode
    token-mean. Log-probs (B, R, V) of student and teacher, (B, R) of the tokens, and the mask of those that count."""
    if topk:
        words = student.topk(topk, -1).indices  # dp_actor.py: the student's
        student, teacher = (with_tail(of.gather(-1, words)) for of in (student, teacher))
    if alpha == 0.0:
        kl = kl_div(student, teacher, reduction="none", log_target=True)
    elif alpha == 1.0:
        kl = kl_div(teacher, student, reduction="none", log_target=True)
    else:
        share = torch.tensor(alpha)
        mixture = torch.logsumexp(torch.stack([student + (1 - share).log(), teacher + share.log()]), 0)
        of_teacher = kl_div(mixture, teacher, reduction="none", log_target=True)
        of_student = kl_div(mixture, student, reduction="none", log_target=True)
        kl = torch.lerp(of_student, of_teacher, share)
    losses = kl.sum(-1)
    if is_clip is not None:
        losses = losses * (new - old).detach().clamp(-20.0, 20.0).exp().clamp(max=is_clip)
    return (losses * mask).sum() / mask.sum().clamp(min=1.0)


def with_tail(logprobs):
    """release_loss's add_tail: one more word that has what the top k leave."""
    total = torch.logsumexp(logprobs, -1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logprobs, (-torch.expm1(total)).log()], -1)


KINDS_OF = {0.0: "forward", 0.3: "jsd", 0.5: "jsd", 1.0: "reverse"}  # the release's alpha


@pytest.mark.parametrize("topk", [None, 6])
@pytest.mark.parametrize("is_clip", [None, 1.1])
@pytest.mark.parametrize("alpha", KINDS_OF)
def test_sdpo_is_the_releases_loss(alpha, is_clip, topk):
    """Value and gradient at random logits. Of 7 words the top 6 and a tail are all."""
    random = torch.Generator().manual_seed(1)
    own, others = (torch.randn(3, 4, 7, generator=random) for _ in range(2))
    old, tokens = torch.randn(3, 4, generator=random) - 2, torch.randint(7, (3, 4, 1), generator=random)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]])  # the second row has no peer

    def of(loss):
        logits = own.clone().requires_grad_()
        student = logits.log_softmax(-1)
        value = loss(student, others.log_softmax(-1), student.gather(-1, tokens)[..., 0])
        value.backward()
        return value.item(), logits.grad

    def ours(student, teacher, new):
        kept = mask.bool()
        losses = divergence(KINDS_OF[alpha], student[kept], teacher[kept], beta=alpha)
        return (losses * (clipped_ratio(new[kept], old[kept], is_clip) if is_clip else 1)).mean()

    theirs = lambda student, teacher, new: release_loss(
        student, teacher, new, old, mask, alpha=alpha, is_clip=is_clip, topk=topk
    )
    (value, gradient), (expected, expected_gradient) = of(ours), of(theirs)
    assert value == pytest.approx(expected, rel=1e-4) and value > 0.01
    assert torch.allclose(gradient, expected_gradient, atol=1e-5)
    assert gradient[1].abs().max() == 0


@pytest.mark.parametrize("is_clip", [2.0, None])
def test_sdpo_through_two_models_is_the_releases_loss(is_clip, llama, qwen):
    """Three episodes of one step, the second without a peer: its tokens count in our mean alone."""
    h, h_hat, y = [[5, 6, 7], [5, 9], [8, 7, 6]], [[5, 20, 6, 7], None, [8, 21, 7, 6]], [[3, 4], [9, 3, 3], [11]]
    row_of = lambda model, context, answer: model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
    steps = [Step((), "", context, answer, "", "", True) for context, answer in zip(h, y, strict=True)]
    old = torch.full((3, 3), NAN)  # (B, R)
    student, teacher = torch.zeros(3, 3, len(llama.lm_head.weight)), torch.zeros(3, 3, len(llama.lm_head.weight))
    for row, answer in enumerate(y):
        size, seen = len(answer), h_hat[row] or h[row]
        student[row, :size] = row_of(llama, h[row], answer).log_softmax(-1)
        teacher[row, :size] = row_of(qwen, seen, answer).detach().log_softmax(-1)
        old[row, :size] = student[row, :size].detach().gather(-1, torch.tensor(answer)[:, None])[:, 0] - 0.5
    played = [Trajectory("", 0, [step], True) for step in steps]
    batch = Batch(played, [None] * 3, [[()]] * 3, {"episode": h_hat}, old, None, {})
    batch.advantages = SimpleNamespace(total=torch.zeros(3, 3))
    config = laptop(algo="sdpo", is_clip=is_clip)
    assert (config.divergence, config.jsd_beta, config.kl) == ("jsd", 0.5, 0)
    run = SimpleNamespace(config=config, policy=llama, models={"reference": qwen})

    def gradient(loss) -> torch.Tensor:
        llama.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in llama.parameters()])

    mask = batch.mask * torch.tensor([[1], [0], [1]])
    new, old = (old + 0.5).nan_to_num(), old.nan_to_num()
    released = release_loss(student, teacher, new, old, mask, alpha=0.5, is_clip=is_clip)
    losses, terms = variant_of("sdpo").loss(run, pack(h, y, packed=False), batch)
    assert released > 0.1
    assert losses.sum().item() == pytest.approx(released.item() * 3, rel=1e-4)
    assert terms["loss/distill"].count_nonzero() == 3 and terms["loss/policy"].count_nonzero() == 0
    theirs = gradient(released * 3)
    assert (gradient(losses.sum()) - theirs).norm() < 1e-3 * theirs.norm()
    batch.trajectories[:] = [Trajectory("", 0, steps, True)]  # as turns of one episode: the first one's end is left out
    _, of_turns = variant_of("sdpo").loss(run, pack(h, y, packed=False), batch)
    kept = torch.tensor([1, 0, 0, 0, 0, 1])
    assert torch.equal(of_turns["loss/distill"], terms["loss/distill"] * kept)


def test_the_end_of_a_turn_counts_in_the_last_turn_alone():
    steps = [Step((), "", [1], [2] * length, "", "", True) for length in (2, 3, 1, 3)]
    played = [Trajectory("", 0, steps[:3], True), Trajectory("", 0, steps[3:], True)]
    old = torch.tensor([[-1, -1, NAN], [-1, -1, -1], [-1, NAN, NAN], [-1, -1, -1]])
    batch = Batch(played, [None] * 2, [[()] * 3, [()]], {}, old, None, {})
    assert turn_ends(batch).int().tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    nobody = Batch([], [], [], {}, torch.zeros(0, 0), None, {})  # a process without an episode
    assert turn_ends(nobody).shape == (0, 0)


def test_a_solution_is_the_first_other_one_of_the_group():
    ends = [(0, False), (0, True), (0, True), (1, True), (1, False), (2, False), (2, False)]  # group, success
    steps = [Step((), "", [1], [2], "look", "look", True)]
    played = [Trajectory("", group, steps, success) for group, success in ends]
    played.insert(0, Trajectory("", 0, [], True))  # a solution with nothing to show
    found = [peer_of(played, at) for at in range(len(played))]
    sources = [next((i for i, other in enumerate(played) if other is peer), None) for peer in found]
    assert sources == [2, 2, 3, 2, None, 4, None, None]


def test_a_solution_is_shown_by_its_valid_actions():
    made = lambda action: Step((), "seen", [1], [2], f"<think>why</think> {action}", action, action != "huh")
    steps = [made(action) for action in ("a", "huh", "b c")]
    assert transcript(Trajectory("", 0, steps, True)) == "first a then b c"
    assert transcript(Trajectory("", 0, steps[1:2], True)) == ""


# ---- other tasks' skills: opid-shuffled, opid-contrast ---------------------------------------------------------------

SKILLS = Skills("summary", "work in order", {1: "open it"})
EPISODE, STEP = Guidance("episode", "work in order"), Guidance("step", "open it")


def of_tasks(*tasks: tuple[int, str]) -> list[Trajectory]:
    """One trajectory for each (task, type)."""
    return [Trajectory("", group, [], True, task_type=kind) for group, kind in tasks]


def shuffle_skills(skills: list[Skills | None], trajectories: list[Trajectory], seed: int) -> list[Skills | None]:
    """What opid-shuffled makes of the skills that were written."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opid_shuffled, "own_skills", lambda run, trajectories: (skills, {"skills/parse_rate": 0.5}))
        shuffled, metrics = opid_shuffled.VARIANT.skills(SimpleNamespace(rng=random.Random(seed)), trajectories)
    assert metrics == {"skills/parse_rate": 0.5}
    return shuffled


def counterparts(routes: list[Route], skills: list[Skills | None], trajectories: list[Trajectory]) -> list[Route]:
    batch = Batch(trajectories, skills, routes, {}, torch.zeros(0, 0), None, {})
    return other_routes(batch, random.Random(0))


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abc")), min_size=2, max_size=9), st.integers(0, 99))
def test_shuffled_skills_come_from_another_type_where_there_is_one(tasks, seed):
    trajectories = of_tasks(*((group, kind + str(group % 2)) for group, kind in tasks))
    skills = [Skills("", str(i), {}) for i in range(len(tasks))]
    if len({t.group for t in trajectories}) == 1:  # the other tasks' prompts were too long: no skill, and no end
        assert shuffle_skills(skills, trajectories, seed) == [None] * len(tasks)
        return
    got = shuffle_skills(skills, trajectories, seed)
    assert got == shuffle_skills(skills, trajectories, seed)
    for own, taken in zip(trajectories, got, strict=True):
        source = trajectories[int(taken.episode)]
        assert source.group != own.group
        others = {t.task_type for t in trajectories if t.group != own.group}
        assert source.task_type != own.task_type or others == {own.task_type}


def test_shuffling_depends_on_the_seed_and_passes_over_those_without_skills():
    trajectories = of_tasks((0, "a"), (0, "a"), (1, "b"), (1, "b"), (2, "c"), (2, "c"))
    skills = [Skills("", str(i), {}) for i in range(6)]
    assert len({str(shuffle_skills(skills, trajectories, seed)) for seed in range(9)}) > 3
    assert shuffle_skills([None, SKILLS], of_tasks((0, "a"), (1, "b")), 0) == [SKILLS, None]


def test_counterparts_keep_the_routes_and_take_the_words_of_another_task():
    trajectories = of_tasks((0, "a"), (1, "b"), (2, "a"))
    skills = [Skills("", "E0", {1: "S0"}), Skills("", "E1", {0: "S1", 4: "T1"}), None]
    routes = [[(EPISODE,), (STEP,), (EPISODE, STEP)], [(EPISODE,)], [()]]
    swapped = counterparts(routes, skills, trajectories)
    assert [[[g.level for g in gs] for gs in route] for route in swapped] == [
        [["episode"], ["step"], ["episode", "step"]],
        [["episode"]],
        [[]],
    ]
    assert {g.text for gs in swapped[0] for g in gs if g.level == "episode"} == {"E1"}
    assert {g.text for gs in swapped[0] for g in gs if g.level == "step"} <= {"S1", "T1"}
    assert swapped[1] == [(Guidance("episode", "E0"),)]


def test_a_level_that_no_other_task_has_a_skill_of_has_no_counterpart():
    trajectories, routes = of_tasks((0, "a"), (1, "b")), [[(EPISODE,), (STEP,)], [()]]
    for other in (Skills("", "E1", {}), Skills("", "E1", {0: " "})):
        swapped = counterparts(routes, [SKILLS, other], trajectories)
        assert swapped[0] == [(Guidance("episode", "E1"),), ()]
    assert counterparts(routes, [SKILLS, None], trajectories)[0] == [(), ()]
