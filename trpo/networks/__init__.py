"""Networks, and their linearisations f(θ + v) ≈ f(θ) + Jv.

A `Linearization` gives the output f(θ) [B, K] and the two products with the Jacobian J = ∂f/∂θ [B·K, P] from which
gradients (Jᵀu) and Gauss-Newton products (JᵀMJv) are built. `MlpLinearization` does it in closed form from cached
activations: one product costs four matrix passes and no graph. `NativeLinearization` is the same, compiled.
`AutogradLinearization` does it for any module.
"""
