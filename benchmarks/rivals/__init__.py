"""The sides of the GPU benchmark: each a small file behind one interface (`contestant`), each in a process of its own.

Only the driver, `benchmarks.gpu`, knows more than one of them.
"""
