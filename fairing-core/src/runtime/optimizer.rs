//! The optimizers, which live on the parameter servers and know nothing of burn.
