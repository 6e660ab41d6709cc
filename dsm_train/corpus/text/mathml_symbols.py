"""LaTeX names of the characters, functions and alphabets of MathML."""

from __future__ import annotations

SYMBOLS = {
    pair[0]: pair[2:]
    for pair in (
        "α alpha,β beta,γ gamma,δ delta,ε varepsilon,ϵ epsilon,ζ zeta,η eta,θ theta,ϑ vartheta,ι iota,κ kappa,ϰ varkappa,"
        "λ lambda,μ mu,µ mu,ν nu,ξ xi,ο o,π pi,ϖ varpi,ρ rho,ϱ varrho,σ sigma,ς varsigma,τ tau,υ upsilon,φ varphi,ϕ phi,"
        "χ chi,ψ psi,ω omega,Γ Gamma,Δ Delta,∆ Delta,Θ Theta,Λ Lambda,Ξ Xi,Π Pi,Σ Sigma,Υ Upsilon,Φ Phi,Ψ Psi,Ω Omega,"
        "∑ sum,∏ prod,∐ coprod,∫ int,∬ iint,∭ iiint,∮ oint,⋃ bigcup,⋂ bigcap,⨁ bigoplus,⨂ bigotimes,⋁ bigvee,⋀ bigwedge,"
        "⨆ bigsqcup,± pm,∓ mp,× times,÷ div,· cdot,⋅ cdot,∙ bullet,• bullet,∗ ast,⋆ star,∘ circ,⊕ oplus,⊖ ominus,⊗ otimes,"
        "⊙ odot,⊘ oslash,∧ wedge,∨ vee,∩ cap,∪ cup,⊓ sqcap,⊔ sqcup,∖ setminus,⧵ setminus,⋊ rtimes,⋉ ltimes,† dagger,"
        "‡ ddagger,≤ le,⩽ leqslant,≥ ge,⩾ geqslant,≠ ne,≡ equiv,≢ not\\equiv,≈ approx,≉ not\\approx,≅ cong,≃ simeq,∼ sim,"
        "≁ nsim,∝ propto,≪ ll,≫ gg,≺ prec,≻ succ,⪯ preceq,⪰ succeq,≼ preceq,≽ succeq,≲ lesssim,≳ gtrsim,≔ coloneqq,"
        "≐ doteq,≜ triangleq,∈ in,∉ notin,∋ ni,⊂ subset,⊃ supset,⊆ subseteq,⊇ supseteq,⊊ subsetneq,⊋ supsetneq,"
        "⊄ not\\subset,⊈ nsubseteq,∣ mid,∤ nmid,∥ parallel,∦ nparallel,⊥ perp,⟂ perp,⊢ vdash,⊨ models,⊣ dashv,⊴ unlhd,"
        "⊲ lhd,⊳ rhd,⊵ unrhd,→ to,⟶ longrightarrow,← leftarrow,⟵ longleftarrow,↔ leftrightarrow,⇒ Rightarrow,"
        "⟹ Longrightarrow,⇐ Leftarrow,⟸ Longleftarrow,⇔ Leftrightarrow,⟺ iff,↦ mapsto,⟼ longmapsto,↑ uparrow,"
        "↓ downarrow,↕ updownarrow,↗ nearrow,↘ searrow,↪ hookrightarrow,↩ hookleftarrow,↠ twoheadrightarrow,"
        "⇀ rightharpoonup,⇌ rightleftharpoons,⇝ rightsquigarrow,∞ infty,∂ partial,∇ nabla,∀ forall,∃ exists,∄ nexists,"
        "¬ neg,∅ emptyset,⌀ varnothing,ℵ aleph,ℏ hbar,ı imath,ȷ jmath,ℓ ell,℘ wp,∠ angle,△ triangle,□ square,◻ square,"
        "■ blacksquare,◊ lozenge,⋄ diamond,⊤ top,√ surd,… dots,⋯ cdots,⋮ vdots,⋱ ddots,⟨ langle,⟩ rangle,〈 langle,"
        "〉 rangle,⌊ lfloor,⌋ rfloor,⌈ lceil,⌉ rceil,‖ |,{ {,} },% %,# #,& &,$ $,_ _,\\ backslash,~ sim"
    ).split(",")
}  # fmt: skip
PLAIN = {
    "−": "-", "–": "-", "‐": "-", "‑": "-", "′": "'", "″": "''", "‴": "'''", "’": "'", "∶": ":", "∕": "/", "⁄": "/",
    "＝": "=", "＋": "+", "，": ",", "\u00a0": r"\ ", "\u2003": r"\quad ", "\u2009": r"\,", "^": r"\hat{}",
    "ƒ": "f", "ℎ": "h", "ø": r"\emptyset ", "≱": r"\not\ge ",
} | dict.fromkeys("\u2061\u2062\u2063\u2064\u200b\u200c\u200d\u2060\ufeff\ufe00", "")  # fmt: skip
FUNCTIONS = frozenset(
    "arccos arcsin arctan arg cos cosh cot coth csc deg det dim exp gcd hom inf ker lg lim liminf limsup ln log max min "
    "Pr sec sin sinh sup tan tanh".split()
)
VARIANTS = {
    "normal": "mathrm", "bold": "mathbf", "bold-italic": "boldsymbol", "double-struck": "mathbb", "script": "mathcal",
    "bold-script": "mathcal", "fraktur": "mathfrak", "bold-fraktur": "mathfrak", "sans-serif": "mathsf",
    "monospace": "mathtt",
}  # fmt: skip
NAMED_FONTS = (
    ("DOUBLE-STRUCK", "mathbb"), ("FRAKTUR", "mathfrak"), ("BLACK-LETTER", "mathfrak"), ("SCRIPT", "mathcal"),
    ("MONOSPACE", "mathtt"), ("SANS-SERIF", "mathsf"), ("BOLD ITALIC", "boldsymbol"), ("BOLD", "mathbf"),
)  # fmt: skip
TEXT_ESCAPES = {c: f"\\{c}" for c in "{}$&#_%"} | {"\\": r"\backslash ", "~": r"\sim ", "^": r"\^{}"}
