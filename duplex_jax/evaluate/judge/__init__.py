"""MT-Bench and MT-Eval: conversations that a model answers, and scores that a judge gives the answers."""
