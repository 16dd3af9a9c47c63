"""ALFWorld: household tasks in text. env.py is the environment, engine.py the two engines that play it, games.py makes
games from the facts about rooms in rooms.py, files.py and pddl.py read game files, expert.py plans."""

from envs.alfworld.env import SPLITS, TASK_TYPES, AlfworldEnv, cached_games, list_games, room_of, words
from envs.alfworld.games import generate_games

__all__ = ["SPLITS", "TASK_TYPES", "AlfworldEnv", "cached_games", "generate_games", "list_games", "room_of", "words"]
