"""What tools/train_proxy.py is made of: text, model, training, and the published folder."""
