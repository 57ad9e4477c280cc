"""Flags by which XLA compiles for the CPU in less than half the time; what the suite takes is mostly compilation of
programs that run once on tiny arrays.

Level 0 leaves out LLVM's optimisations, and fusions are written by the emitters of before, without MLIR. Those err
where nothing is fused (`--xla_disable_hlo_passes=fusion`), so test_fast_xla.py compares a run with one compiled as
users compile it. An XLA that has no such flag any more ends the process and names it: take it out here then.
"""

FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
