"""Camera-like clips with known answers: what a model is trained on and accuracy is measured with.

`world` plans and draws scenes, `questions` asks about them. Numpy only; a seed gives the same clip everywhere.
"""
