"""What a run costs and what it survives: measurements, plans, faults. `python -m bench.NAME`."""
