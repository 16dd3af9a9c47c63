"""WebShop: buy what an instruction asks for. env.py is the environment, data.py and catalogue.py its products, pages.py
and search.py the shop, rewards.py the reward, compact.py the words of small models, expert.py shops by script."""

from envs.webshop.catalogue import generate_catalogue
from envs.webshop.compact import VOCABULARY
from envs.webshop.data import SPLITS, load_shop
from envs.webshop.env import WebshopEnv
from envs.webshop.rewards import nouns, reward

__all__ = ["SPLITS", "VOCABULARY", "WebshopEnv", "generate_catalogue", "load_shop", "nouns", "reward"]
