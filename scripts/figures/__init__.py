"""The figures of study.py: `commands` has one function per figure, `world` their default prompts.

The functions that compute and draw are in `sd.study`.
"""
