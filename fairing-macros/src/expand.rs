//! What is written: a few lines that call `::fairing_core::__private`, by absolute paths only.

use proc_macro2::{Delimiter, Group, Ident, Span, TokenStream};
use quote::{ToTokens, format_ident, quote, quote_spanned};
use syn::DeriveInput;
use syn::ext::IdentExt;

use crate::check::{Checked, Integer, Job, Number, Setting};

/// The struct, its implementation and its registration.
pub(crate) fn job(job: &Job) -> TokenStream {
    let Job { item, settings } = job;
    let name = &item.ident;
    let type_name = name.unraw().to_string();
    let fields = settings.iter().map(field);
    let constants = settings.iter().filter_map(constant);
    // The implementation must go where the struct goes.
    let conditions = item.attrs.iter().filter(|attribute| attribute.path().is_ident("cfg"));
    quote! {
        #item

        #(#conditions)*
        const _: () = {
            #(#constants)*

            #[automatically_derived]
            impl ::fairing_core::DistributedTraining for #name {
                const ATTRIBUTE: ::fairing_core::__private::Attribute = ::fairing_core::__private::Attribute {
                    #(#fields,)*
                    ..::fairing_core::__private::Attribute::NONE
                };
                const NAME: &'static ::core::primitive::str = ::core::concat!(::core::module_path!(), "::", #type_name);
            }

            ::fairing_core::__private::inventory::submit! {
                ::fairing_core::__private::Registration::new::<#name>(
                    ::core::concat!(::core::module_path!(), "::", #type_name),
                    ::core::file!(),
                    ::core::line!(),
                )
            }
        };
    }
}

/// An implementation beside an error, so that calls of `launch()` are no errors of their own. Nothing for an item that can
/// have no implementation.
pub(crate) fn stub(item: TokenStream) -> TokenStream {
    let Ok(item) = syn::parse2::<DeriveInput>(item) else { return TokenStream::new() };
    let name = &item.ident;
    let (parameters, arguments, bounds) = item.generics.split_for_impl();
    let predicates = bounds.iter().flat_map(|bounds| &bounds.predicates);
    quote! {
        #[automatically_derived]
        impl #parameters ::fairing_core::DistributedTraining for #name #arguments
        where
            #(#predicates,)*
            // Under a quantifier an unmet bound is no error here: what is missing will be said when the attribute is right.
            for<'unmet> Self: ::fairing_core::Train + ::fairing_core::__private::Travels,
        {
            const ATTRIBUTE: ::fairing_core::__private::Attribute = ::fairing_core::__private::Attribute::NONE;
            const NAME: &'static ::core::primitive::str = "";
        }
    }
}

/// `workers: Some(2)`.
fn field(setting: &Setting) -> TokenStream {
    let Setting { field, value } = setting;
    // The key's own span would make the reader of an error look for a struct at the key.
    let name = Ident::new(&field.to_string(), Span::call_site());
    let value = match value {
        Checked::Number(number) => number_value(field, number),
        Checked::Cores(number) => {
            let number = number_value(field, number);
            quote!(::fairing_core::__private::AttributeCpu::Cores(#number))
        }
        Checked::CpuText(text) => quote!(::fairing_core::__private::AttributeCpu::Text(#text)),
        Checked::Text(text) => quote!(#text),
        Checked::Boolean(value) => quote!(#value),
        Checked::List(entries) => quote!(&[#(#entries),*]),
    };
    quote!(#name: ::core::option::Option::Some(#value))
}

fn number_value(field: &Ident, number: &Number) -> TokenStream {
    match number {
        Number::Literal(literal) => quote!(#literal),
        Number::Constant { .. } => constant_name(field).into_token_stream(),
    }
}

/// A constant expression stands once, in a constant of its own: a wrong type is one error, and a zero is found whether or
/// not anything uses the type.
fn constant(setting: &Setting) -> Option<TokenStream> {
    let (Checked::Number(number) | Checked::Cores(number)) = &setting.value else { return None };
    let Number::Constant { expr, kind, zero } = number else { return None };
    let name = constant_name(&setting.field);
    let kind = match kind {
        Integer::U32 => quote!(::core::primitive::u32),
        Integer::U64 => quote!(::core::primitive::u64),
    };
    let assertion = zero.as_ref().map(|message| {
        let (first, last) = Number::ends(expr);
        let mut condition = Group::new(Delimiter::Parenthesis, quote!(#name >= 1, #message));
        condition.set_span(last);
        let assertion = quote_spanned!(first=> ::core::assert!);
        quote!(const _: () = #assertion #condition;)
    });
    Some(quote! {
        const #name: #kind = #expr;
        #assertion
    })
}

fn constant_name(field: &Ident) -> Ident {
    format_ident!("__FAIRING_{}", field.to_string().to_uppercase(), span = Span::call_site())
}
