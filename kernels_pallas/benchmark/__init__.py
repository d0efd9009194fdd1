"""The parts of `python -m kernels_pallas.bench`: workloads, measurement, tuning, reports."""
