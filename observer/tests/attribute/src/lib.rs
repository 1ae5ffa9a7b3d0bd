//! The attribute `#[real_test]`, which registers a function with the harness in `observer/tests/harness.rs`.
//! It is a crate of its own because attribute macros have to be.

use proc_macro::{TokenStream, TokenTree};

/// Registers a test. The arguments are methods of the harness's `Test`: `#[real_test(alone, contract)]` calls
/// `.alone().contract()`, and `#[real_test(programs(&["nginx"]))]` passes an argument.
#[proc_macro_attribute]
pub fn real_test(declared: TokenStream, function: TokenStream) -> TokenStream {
    let tokens: Vec<TokenTree> = function.clone().into_iter().collect();
    let is_fn = |token: &TokenTree| matches!(token, TokenTree::Ident(word) if word.to_string() == "fn");
    let name = tokens.iter().position(is_fn).and_then(|at| tokens.get(at + 1));
    let Some(TokenTree::Ident(name)) = name else {
        return "compile_error!(\"real_test requires a function\");".parse().expect("valid Rust");
    };
    let methods = methods(declared);
    let registration = format!(
        "::inventory::submit! {{ \
             crate::harness::Test::new(module_path!(), stringify!({name}), {name}){methods} \
         }}"
    );
    let registration: TokenStream = registration.parse().expect("valid Rust");
    function.into_iter().chain(registration).collect()
}

/// Turns `a, b(c)` into `.a().b(c)`.
fn methods(declared: TokenStream) -> String {
    let mut methods = String::new();
    let mut declared = declared.into_iter().peekable();
    while let Some(token) = declared.next() {
        match token {
            TokenTree::Ident(name) => {
                methods += &format!(".{name}");
                if !matches!(declared.peek(), Some(TokenTree::Group(_))) {
                    methods += "()";
                }
            }
            TokenTree::Group(arguments) => methods += &arguments.to_string(),
            TokenTree::Punct(_) | TokenTree::Literal(_) => {}
        }
    }
    methods
}
