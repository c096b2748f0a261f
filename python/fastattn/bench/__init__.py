"""The measurements: `python -m fastattn bench`, the same code that `python benchmarks` calls.

    cells.py    what is measured: shapes, masks, the suites
    arrays.py   NumPy's and torch's arrays, each with its clock
    peers.py    who is measured: ours and the libraries beside it
    formula.py  attention by its definition, for the benchmark and the tests on a GPU
    judge.py    how far an output is from it, and how far it may be
    gradients.py  the same of gradients
    fa3.py      FlashAttention-3's gradients, in a process of their own
    measure.py  one cell: checked, then timed in turn
    machine.py  the limits of the machine, and what a result says of where it was measured
    report.py   what follows from the times, as text
    plot.py     the same as pictures
    cli.py      the command line
    cpu.py      the CPU beside torch as a program meets them: `python -m fastattn.bench.cpu`
    training.py forward and backward so: `python -m fastattn.bench.training`
    decode.py   the suite decode, few rows against many keys so: on the CPU
    serving.py  the same on a GPU: pages, ragged batches, new keys, the mass
    chunked.py  prompts and single tokens in one call there
    generate.py tokens of transformers' Llama on a GPU: `python -m fastattn.bench.generate`
    llama.py    a Llama's training step on a GPU: `python -m fastattn.bench.llama`; llama_model.py
    merge.py    merging on a GPU beside a copy: `python -m fastattn.bench.merge`
    jax.py      programs of JAX beside those with jax.nn's: `python -m fastattn.bench.jax`

`import fastattn` imports none of it.
"""
