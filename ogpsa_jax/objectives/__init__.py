"""What is differentiated: SFT cross-entropy, preference losses, the reference objective.

An objective is ``(model, batch) -> (loss_sum, weight, metrics)``: float32 scalars, the metrics
summed over the same weight, so that any cut into micro-batches adds up to the same step.
"""
