"""What came out: evaluation, plots, the quickstart."""
