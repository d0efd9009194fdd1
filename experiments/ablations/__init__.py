"""Ablations: their arms, runs, results and reports."""
