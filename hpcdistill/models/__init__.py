"""Networks: tensors in, tensors out; they know nothing of training."""
