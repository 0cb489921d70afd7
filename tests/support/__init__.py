"""What several rooms' tests share: golden tensors, small models, fakes."""
