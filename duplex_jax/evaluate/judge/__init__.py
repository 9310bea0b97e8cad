"""MT-Bench and MT-Eval: a model answers conversations, and a judge model scores the answers."""
