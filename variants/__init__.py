"""Methods that are not OPID, a file each: `--algo NAME` takes variants/NAME.py, where some of OPID's functions change.

    opid-shuffled, opid-placebo, opid-oracle    controls: other tasks' skills, empty words, a script's skills
    opid-contrast, opid-shift, opid-full        A_skill against another skill; of the skill alone; exact, in the loss
    grpo, gigpo                                 no skills
    sdar, grpo+opsd, opsd, skill-sd, rlsd       skills that act through the loss, or rescale A_ep
    sdpo                                        in the loss: a solution of the group's own in the place of a skill
    skill-grpo                                  acts under skills
    opd, oprd                                   learn from a larger model, or from its hidden states

Notation: A_ep is the outcome advantage, Delta = log pi(y | h with skill) - log pi_old(y | h) the skill shift of a
sampled token. Sources are the authors' releases, jinyangwu/OPID (37a15a5) and ZJU-REAL/SDAR (8b85c23).
"""
