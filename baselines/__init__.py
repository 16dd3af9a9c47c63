"""Every method that is not OPID or GRPO, each a file of hooks (method.py); `--algo` picks from the table below.

Notation: A_ep is the outcome advantage, Delta = log pi(y | h with skill) - log pi_old(y | h) the skill shift of a
sampled token. Sources are the authors' releases, jinyangwu/OPID (37a15a5) and ZJU-REAL/SDAR (8b85c23).
"""

from baselines.acting import SkillGrpo
from baselines.controls import Oracle, Placebo, Shuffled
from baselines.distillation import GrpoOpsd, Opsd, Sdar, SkillSd
from baselines.gigpo import Gigpo
from baselines.method import Grpo, Method
from baselines.opd import Opd
from baselines.oprd import Oprd
from baselines.rlsd import Rlsd

METHODS: dict[str, type[Method]] = {
    "opid": Method,
    "opid-shuffled": Shuffled,
    "opid-placebo": Placebo,
    "opid-oracle": Oracle,
    "grpo": Grpo,
    "gigpo": Gigpo,
    "opd": Opd,
    "oprd": Oprd,
    "opsd": Opsd,
    "grpo+opsd": GrpoOpsd,
    "sdar": Sdar,
    "rlsd": Rlsd,
    "skill-sd": SkillSd,
    "skill-grpo": SkillGrpo,
}
