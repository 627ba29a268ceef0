"""Benchmarks: what training reaches (`learning`), how fast it gets there (`speed`), ours and other implementations'.

Nothing is imported here: the processes that measure other implementations load as little of ours as they can.
"""
