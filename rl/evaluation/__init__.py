"""Score tables of test cases, controls that a claim must beat, calibration, latency."""
