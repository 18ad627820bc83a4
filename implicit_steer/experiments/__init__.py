"""The paper's experiments: data, networks, training, figures."""
