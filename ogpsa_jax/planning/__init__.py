"""What a run needs of machines that need not be here: ``ogpsa-jax plan``."""
