"""The front end: the model (model), traced once (trace) into a Program (programs), checked (verify) and rewritten (passes)."""
