"""What turns messages into tokens and tokens into numbers.

encoder.py    messages to token ids, through the chat template
sampler.py    `generate`, with the cache kept over turns
packing.py    many rows as few sequences; branches.py: the rows that leave one of them
logprobs.py   the pass itself, log p of given tokens
obstacles.py  what an architecture allows without changing its numbers
writers.py    who writes the skills
loading.py    loading and saving
parallel.py   many processes: gradients summed, weights shared out; watch.py: none goes on without the others
"""
