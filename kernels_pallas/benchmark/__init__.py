"""What `python -m kernels_pallas.bench` is made of: workloads, measurement, tuning, reports."""
