"""Benchmarks: time and memory of programs, numerical errors, plans, answers of models."""
