"""What bench.py is made of: measuring ours and others in turns, each in a process of its own.

cases    what is measured: inputs, how much arithmetic          sides    whose: ours, diffusers, compiled, OpenVINO
weights  the same weights for all sides                         workers  objects in processes of their own
runner   one side in its process: time and memory of a run      peak     what the machine reaches
start    from a new interpreter to the first step               report   rows, tables, the file that is kept
"""
