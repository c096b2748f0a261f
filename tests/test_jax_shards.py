"""Arrays on several devices, through shard_map: two CPU devices, in a process of their own."""

import pytest
from conftest import needs, python

WORK = """
import jax, jax.numpy as jnp, numpy as np, fastattn
from functools import partial
from jax.sharding import Mesh, PartitionSpec as P

shard_map = getattr(jax, "shard_map", None)
if shard_map is None:  # before JAX 0.7
    from jax.experimental.shard_map import shard_map
mesh = Mesh(np.array(jax.devices()), ("x",))
assert mesh.size == 2
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.standard_normal((4, 2, 6, 8)), jnp.float32) for _ in range(3))
bias = jnp.asarray(rng.standard_normal((1, 2, 6, 6)), jnp.float32)

def attend(q, k, v, bias):
    return fastattn.attention(q, k, v, mask=bias, causal=True, return_lse=True)

def loss(f):
    def whole(*arrays):
        out, lse = f(*arrays)
        return (out ** 2).sum() + lse.sum()
    return whole

def check(specs, out_specs):
    sharded = shard_map(attend, mesh=mesh, in_specs=specs, out_specs=out_specs)
    for one, two in zip(jax.jit(sharded)(q, k, v, bias), attend(q, k, v, bias)):
        np.testing.assert_array_equal(one, two)
    every = (0, 1, 2, 3)
    got = jax.jit(jax.grad(loss(sharded), every))(q, k, v, bias)
    want = jax.jit(jax.grad(loss(attend), every))(q, k, v, bias)
    for one, two in zip(got, want):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)

batch, heads = P("x"), P(None, "x")
check((batch, batch, batch, P()), (batch, batch))  # the bias is the same on both
check((heads, heads, heads, heads), (heads, heads))
rows = P(None, None, "x")
whole = fastattn.attention(q, k, v, return_lse=True)
one = shard_map(lambda q, k, v: fastattn.attention(q, k, v, return_lse=True), mesh=mesh,
                in_specs=(rows, P(), P()), out_specs=(rows, rows))(q, k, v)
np.testing.assert_allclose(one[0], whole[0], rtol=1e-5, atol=1e-5)
grad = lambda f: jax.jit(jax.grad(lambda k: (f(k)[0] ** 2).sum()))(k)
np.testing.assert_allclose(
    grad(lambda k: shard_map(lambda q, k, v: fastattn.attention(q, k, v, return_lse=True),
         mesh=mesh, in_specs=(rows, P(), P()), out_specs=(rows, rows))(q, k, v)),
    grad(lambda k: fastattn.attention(q, k, v, return_lse=True)), rtol=1e-5, atol=1e-5)
jax.config.update("jax_enable_checks", True)
def ring(q, k, v):  # each device has half of the keys: partial results, merged
    out, lse = fastattn.attention(q, k, v, return_lse=True)
    other = [jax.lax.ppermute(x, "x", [(0, 1), (1, 0)]) for x in (k, v)]
    more, more_lse = fastattn.attention(q, *other, return_lse=True)
    return fastattn.merge_states([out, more], [lse, more_lse])[0]
ringed = shard_map(ring, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows)
np.testing.assert_allclose(jax.jit(ringed)(q, k, v), whole[0], rtol=1e-5, atol=1e-5)
"""


@needs("jax")
@pytest.mark.parametrize("checks", [True, False], ids=["checked", "unchecked"])
def test_shard_map(checks):
    work = WORK
    if not checks:
        work = WORK.replace(
            "mesh = Mesh(",
            "import inspect\n"
            "names = inspect.signature(shard_map).parameters\n"
            "flag = 'check_vma' if 'check_vma' in names else 'check_rep'\n"
            "shard_map = partial(shard_map, **{flag: False})\nmesh = Mesh(",
            1,
        )
    python("-c", work, XLA_FLAGS="--xla_force_host_platform_device_count=2", JAX_PLATFORMS="cpu")
