"""Latency benchmarks, and the maker of the random models they run on.

Drives the product from outside, through its public interface and its files; never installed, never
imported by the package.
"""
