"""Does a run fit on a TPU slice, and how long might it take: answered without one."""
