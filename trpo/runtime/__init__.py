"""Processes, devices, threads, seeds, signals and clocks: what a run runs on."""
