"""What a run will take, before it takes it: `train.py --plan`, and the lines at the start of a run.

plan.py      phases of a run and their peaks; what to change where it does not fit
passes.py    one pass of each kind; counting.py: its tensors counted without data
machine.py   the memory that there is, and that is held; disk.py: the same of the disk
"""
