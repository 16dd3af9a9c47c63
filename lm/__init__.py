"""What turns messages into tokens and tokens into numbers.

encoder.py        messages to token ids, through the chat template
sampler.py        `generate`, with the cache kept over turns (cache.py)
scoring.py        log p of given responses: packing, branches, the forward pass
obstacles.py      what an architecture allows without changing its numbers
writers.py        who writes the skills; answers.py: what is read from their answers
loading.py        loading, saving, frozen copies; adapters.py: LoRA; precision.py: bfloat16 or not
processes.py      many processes and host memory; watch.py: no process goes on without the others
distributions.py  whole next-token distributions, for variants that need them
"""
