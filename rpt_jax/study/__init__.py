"""What came out: evaluation, samples, patterns, the report, the quickstart."""
