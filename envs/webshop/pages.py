"""WebShop's pages as the official text environment shows them, and what a search or a click does.

Source: princeton-nlp/WebShop, web_agent_site/envs/web_agent_text_env.py (WebAgentTextEnv, SimServer, with
observation_mode="text") and templates/: an observation is a page's visible texts, joined by " [SEP] ".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from random import Random

from envs.webshop.data import Shop
from envs.webshop.search import HITS, Index

SEPARATOR = " [SEP] "
BACK, PREVIOUS, NEXT, BUY = "Back to Search", "< Prev", "Next >", "Buy Now"
SUB_PAGES = ("Description", "Features", "Reviews")
ACTION = re.compile(r"(.+)\[(.+)\]")
JSON_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "'": "\\u0027"})  # as Flask's tojson


@dataclass
class Session:
    """One customer: the goal, the page that is open, the options chosen. `asins` lists the products in catalogue order.

    `page` is "search", "results", "item", one of SUB_PAGES, or "done".
    """

    shop: Shop
    index: Index
    asins: list[str]
    goal: dict
    page_size: int = 10
    page: str = "search"
    keywords: tuple[str, ...] = ()
    found: list[str] = field(default_factory=list)  # asins of all results
    number: int = 1  # of the results page, from 1
    asin: str = ""
    options: dict[str, str] = field(default_factory=dict)

    @property
    def product(self) -> dict:
        return self.shop.products[self.asin]

    @property
    def shown(self) -> list[dict]:
        """The products on the open results page."""
        first = (self.number - 1) * self.page_size
        return [self.shop.products[asin] for asin in self.found[first : first + self.page_size]]

    def clickables(self) -> dict[str, str]:
        """What can be clicked, lower case as in click[...], in the official order -> the name of the option whose value
        it is, or "" for a button or a product. A text that occurs twice is one, the later one."""
        if self.page == "search":
            return {"search": ""}
        if self.page == "done":
            return {}
        if self.page == "results":
            turns = [PREVIOUS, NEXT] if self.number > 1 else [NEXT]
            return dict.fromkeys((text.lower() for text in (BACK, *turns, *(p["asin"] for p in self.shown))), "")
        if self.page == "item":
            buttons = dict.fromkeys((text.lower() for text in (BACK, PREVIOUS, *SUB_PAGES, BUY)), "")
            return buttons | {value: name for name, values in self.product["options"].items() for value in values}
        return dict.fromkeys((BACK.lower(), PREVIOUS.lower()), "")

    def act(self, action: str) -> bool:
        """Do `search[words]` (on any page) or `click[text]`. False where that is no action here: nothing changes."""
        match = ACTION.match(action)
        if match is None:
            return False
        verb, text = match[1], match[2].lower()
        if verb == "search":
            self.search(text)
            return True
        if verb != "click" or text == "search" or text not in (clickables := self.clickables()):
            return False
        self.click(text, clickables[text])
        return True

    def search(self, text: str) -> None:
        self.keywords = tuple(text.split(" "))
        self.found = find(self.keywords, self.shop, self.index, self.asins)
        self.open_results(1)

    def open_results(self, number: int) -> None:
        """Leaving a product for the results drops the options chosen for it."""
        self.page, self.number, self.asin, self.options = "results", number, "", {}

    def click(self, text: str, option: str) -> None:
        if text == BACK.lower():
            self.page, self.asin, self.options = "search", "", {}
        elif self.page == "results":
            self.click_result(text)
        elif self.page == "item":
            self.click_product(text, option)
        else:  # on a sub-page, the way back is all there is
            self.page = "item"

    def click_result(self, text: str) -> None:
        if text == NEXT.lower():
            self.open_results(self.number + 1)
        elif text == PREVIOUS.lower() and self.number > 1:
            self.open_results(self.number - 1)
        else:
            self.page = "item"
            self.asin = next(product["asin"] for product in self.shown if product["asin"].lower() == text)

    def click_product(self, text: str, option: str) -> None:
        sub_pages: dict[str, str] = {name.lower(): name for name in SUB_PAGES}
        if text == BUY.lower():
            self.page = "done"
        elif text == PREVIOUS.lower():
            self.open_results(self.number)
        elif text in sub_pages:
            self.page = sub_pages[text]
        else:
            self.options[option] = text

    def observation(self, score: float | None = None) -> str:
        """The open page. `score` is shown on the last one, after buying."""
        if self.page == "search":
            texts = ["WebShop", "Instruction:", self.goal["instruction_text"], "Search"]
        elif self.page == "done":
            texts = done_texts(self.asin, self.options, score)
        else:
            texts = ["Instruction:", self.goal["instruction_text"], BACK, *self.page_texts()]
        return SEPARATOR.join(text.strip() for text in texts if visible(text))

    def page_texts(self) -> list[str]:
        if self.page == "results":
            turns = [PREVIOUS, NEXT] if self.number > 1 else [NEXT]
            listed = [text for p in self.shown for text in (p["asin"], p["Title"], p["Price"])]
            return [f"Page {self.number} (Total results: {len(self.found)})", *turns, *listed]
        product = self.product
        if self.page == "item":
            options = [text for name, values in product["options"].items() for text in (name, *values)]
            facts = (product["Title"], f"Price: {product['Price']}", f"Rating: {product['Rating']}")
            return [PREVIOUS, *options, *facts, *SUB_PAGES, BUY]
        inside = {
            "Description": [product["Description"]],
            "Features": [f" {feature}" for feature in product["BulletPoints"]],
            "Reviews": [],
        }
        return [PREVIOUS, *inside[self.page]]


def visible(text: str) -> bool:
    """The official parser drops empty texts and white space with a line break, but keeps other white space."""
    return bool(text) and not (text.isspace() and "\n" in text)


def find(keywords: tuple[str, ...], shop: Shop, index: Index, asins: list[str]) -> list[str]:
    """The asins that a search shows: by BM25, or by the official engine's commands (first word, in angle brackets)."""
    command, text = keywords[0], " ".join(keywords[1:]).strip()
    if command == "<r>":
        return Random(0).sample(asins, min(HITS, len(asins)))  # unseeded officially
    if command == "<a>":
        return [asin for asin in asins if text in shop.products[asin]["Attributes"]]
    if command in ("<c>", "<q>"):
        key, wanted = ("category", text.split(" ")[0]) if command == "<c>" else ("query", text)
        return [asin for asin in asins if shop.products[asin][key] == wanted]
    return [asins[number] for number in index.search(" ".join(keywords))]


def done_texts(asin: str, options: dict[str, str], score: float | None) -> list[str]:
    """The page after buying; the official text environment shows these, with most of their values left out."""
    chosen = json.dumps(options, sort_keys=True).translate(JSON_ESCAPES)
    thanks = ["Thank you for shopping with us!", "Your code:", "None", "(Paste it in your MTurk interface.)"]
    bought = ["Purchased", "asin", asin, "options", chosen, "attrs", "None", "category", "None", "query", "None"]
    target = ["asin", "options", "attrs", "price upper", "instuction text", "category", "product category", "query"]
    verdict = ["Reward", "Your score (min 0.0, max 1.0)", str(score), "Reward Details", "None"]
    return [*thanks, *bought, "product category", "None", "Target", *target, "Goal", "None", *verdict]
