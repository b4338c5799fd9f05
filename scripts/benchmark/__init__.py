"""The parts of bench.py: it measures ours and peers alternately, each in its own process.

cases    what is measured: inputs, number of operations         sides    ours, diffusers, compiled, OpenVINO
weights  the same weights for all sides                         workers  objects in other processes
runner   one side in its process: time and memory of a run      peak     peak rate of the machine
start    from a new interpreter to the first step               report   rows, tables, the file of results
"""
