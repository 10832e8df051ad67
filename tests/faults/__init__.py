"""Fault injection: kills, failing calls, links, two writers, a hostile server, damaged files.

See docs/explanation/faults.md.
"""
