//! The manual page, in the format of `man`. It is generated from the help of the command line, so that each text
//! exists once. clap_mangen does not lay out subcommands with their options, nor the blocks after the help; this file
//! does.

use std::io::{self, Write};

use clap::{Arg, Command, CommandFactory as _};
use clap_mangen::{
    Man,
    roff::{Roff, bold, roman},
};

use crate::cli::Cli;

/// The manual's section for system administration.
const SECTION: &str = "8";

/// Writes the whole page.
pub(crate) fn write(out: &mut impl Write) -> io::Result<()> {
    let mut command = Cli::command();
    command.build();
    let man = Man::new(command.clone()).section(SECTION).title("OBSERVER");
    man.render_title(out)?;
    man.render_name_section(out)?;
    man.render_synopsis_section(out)?;
    man.render_description_section(out)?;
    man.render_options_section(out)?;
    let mut rest = Roff::default();
    commands(&mut rest, &command);
    let more = command.get_after_long_help().map(ToString::to_string).unwrap_or_default();
    more.split("\n\n").for_each(|block| section(&mut rest, block));
    rest.to_writer(out)
}

/// Writes the section COMMANDS: the subcommands and their options.
fn commands(roff: &mut Roff, command: &Command) {
    roff.control("SH", ["COMMANDS"]);
    for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
        let arguments: Vec<_> =
            subcommand.get_arguments().filter(|argument| argument.get_id() != "help").collect();
        let words = arguments.iter().map(|argument| match argument.is_positional() {
            true => format!(" {}", usage(argument)),
            false => format!(" [{}]", usage(argument)),
        });
        let name = format!("{} {}", command.get_name(), subcommand.get_name());
        roff.control("TP", []);
        roff.text([bold(name), roman(words.collect::<String>())]);
        roff.text([roman(subcommand.get_about().map(ToString::to_string).unwrap_or_default())]);
        for argument in arguments {
            let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
            let is_kind_known = command.get_arguments().any(|other| other.get_help() == argument.get_help());
            if !is_kind_known {
                roff.control("br", []);
                roff.text([bold(usage(argument)), roman(format!(": {help}"))]);
            }
        }
    }
}

/// How an argument is written on the command line.
fn usage(argument: &Arg) -> String {
    let takes_values = argument.get_num_args().is_some_and(|count| count.takes_values());
    let values = argument.get_value_names().filter(|_| takes_values).unwrap_or_default().join(" ");
    let flag = argument.get_long().map(|long| format!("--{long} ")).unwrap_or_default();
    format!("{flag}{values}").trim_end().into()
}

/// Writes a block as a section: a title, then text or lines with two columns, of which the second may continue on
/// further lines.
fn section(roff: &mut Roff, block: &str) {
    let (title, body) = block.split_once(':').unwrap_or((block, ""));
    roff.control("SH", [title.to_uppercase().as_str()]);
    for line in body.trim_start_matches('\n').lines() {
        match line.strip_prefix("  ").filter(|line| !line.starts_with(' ')) {
            Some(item) => {
                let (term, text) = item.split_once("  ").unwrap_or((item, ""));
                roff.control("TP", []);
                roff.text([bold(term)]);
                roff.text([roman(text.trim_start())]);
            }
            None => {
                roff.text([roman(line.trim_start())]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> String {
        let mut page = Vec::new();
        write(&mut page).unwrap();
        String::from_utf8(page).unwrap()
    }

    #[test]
    fn it_has_every_option_and_command_that_help_has() {
        let page = page();
        let command = Cli::command();
        let shown = |name: &str| page.contains(&name.replace('-', "\\-"));
        for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
            let long = format!("--{}", argument.get_long().unwrap());
            assert!(shown(&long), "{long} in {page}");
        }
        for subcommand in command.get_subcommands() {
            let name = format!("observer {}", subcommand.get_name());
            assert_eq!(shown(&format!("fB{name}")), !subcommand.is_hide_set(), "{name} in {page}");
        }
    }

    #[test]
    fn blocks_become_sections() {
        let mut roff = Roff::default();
        section(&mut roff, "Words:\n  late      lag, as some\n            call it");
        section(&mut roff, "Live view: wide,\nand high");
        let expected =
            ".SH WORDS\n.TP\n\\fBlate\\fR\nlag, as some\ncall it\n.SH \"LIVE VIEW\"\nwide,\nand high\n";
        assert!(roff.render().ends_with(expected), "{}", roff.render());
    }
}
