"""What evaluate.py is made of: the judge, the rules of scoring, and the probes beside the scores."""
