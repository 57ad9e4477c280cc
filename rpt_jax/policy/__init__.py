"""The model: decoder, sampler, scorer and the proxy that annotates positions."""
