"""The scaling study: sweeps over sizes, budgets and seeds, and the law that their rows follow or not."""
