"""Methods that are not OPID, a file each. `--algo NAME` takes variants/NAME.py: some of OPID's functions replaced.

Notation: A_ep is the outcome advantage, Delta = log pi(y | h with skill) - log pi_old(y | h) the skill shift of a
sampled token. Sources are the authors' releases, jinyangwu/OPID (37a15a5) and ZJU-REAL/SDAR (8b85c23).
"""
