"""XLA's flags for tests, whose programs run once or twice: they compile in a quarter of the time.

LLVM does not optimise, and on CPUs XLA's older code generator writes the kernels. JAX 0.11 no longer has that one, and
an unknown flag ends the process. What users run is compiled as users have it in `tests/smoke.py`, and in processes that
tests start without these flags.
"""

from jaxlib.version import __version_info__

OLDER = __version_info__ < (0, 11)
QUICK = "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * OLDER
# Of `jax.jit`, where a test is about bits that its users get: which operations are fused decides how they round.
USUAL = {"xla_backend_optimization_level": 3, **({"xla_cpu_use_fusion_emitters": True} if OLDER else {})}
