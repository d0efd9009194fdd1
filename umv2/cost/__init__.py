"""Analytic cost of a configuration: parameters, FLOPs, memory traffic and communication."""
