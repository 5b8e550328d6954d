//! What stands between the parentheses of the attribute, each part with its span.

use syn::ext::IdentExt;
use syn::parse::{Parse, ParseStream};
use syn::{Expr, Ident, Token};

/// The arguments in their order. Parsing never fails: what is no argument is among the errors, and the next comma starts
/// afresh.
#[derive(Default)]
pub(crate) struct Args {
    pub(crate) arguments: Vec<Argument>,
    pub(crate) errors: Errors,
}

/// One argument.
pub(crate) struct Argument {
    pub(crate) key: Ident,
    pub(crate) value: Value,
}

/// What stands behind a key.
pub(crate) enum Value {
    /// `key = expression`.
    Expr(Expr),
    /// `key(arguments)`.
    Group(Args),
    /// Nothing.
    Missing,
}

/// Complaints, to be reported together.
#[derive(Default)]
pub(crate) struct Errors(Option<syn::Error>);

impl Errors {
    pub(crate) fn push(&mut self, error: syn::Error) {
        match &mut self.0 {
            Some(first) => first.combine(error),
            None => self.0 = Some(error),
        }
    }

    /// Adds all of `other`.
    pub(crate) fn extend(&mut self, other: Errors) {
        other.0.into_iter().for_each(|error| self.push(error));
    }

    /// The complaints as one error, if there are any.
    pub(crate) fn finish(self) -> syn::Result<()> {
        self.0.map_or(Ok(()), Err)
    }
}

impl Parse for Args {
    fn parse(input: ParseStream) -> syn::Result<Self> {
        let mut args = Self::default();
        while !input.is_empty() {
            match input.parse() {
                Ok(argument) => args.arguments.push(argument),
                Err(error) => args.recover(input, error)?,
            }
            if !input.is_empty() && !input.peek(Token![,]) {
                args.recover(input, input.error("expected `,`"))?;
            }
            input.parse::<Option<Token![,]>>()?;
        }
        Ok(args)
    }
}

impl Args {
    /// Notes `error` and goes on to the next comma.
    fn recover(&mut self, input: ParseStream, error: syn::Error) -> syn::Result<()> {
        self.errors.push(error);
        while !input.is_empty() && !input.peek(Token![,]) {
            input.parse::<proc_macro2::TokenTree>()?;
        }
        Ok(())
    }
}

impl Parse for Argument {
    fn parse(input: ParseStream) -> syn::Result<Self> {
        if !input.peek(Ident::peek_any) {
            return Err(input.error("expected the name of an argument, for example `workers = 2`"));
        }
        let key = input.call(Ident::parse_any)?;
        let value = if input.is_empty() || input.peek(Token![,]) {
            Value::Missing
        } else if input.peek(syn::token::Paren) {
            let group;
            syn::parenthesized!(group in input);
            Value::Group(group.parse()?)
        } else if input.peek(Token![=]) {
            input.parse::<Token![=]>()?;
            if input.is_empty() || input.peek(Token![,]) { Value::Missing } else { Value::Expr(input.parse()?) }
        } else {
            return Err(input.error(format!("expected `=` after `{key}`")));
        };
        Ok(Self { key, value })
    }
}
