// Keeps the reference part of docs/ops/<op>.md: tables of every input and option, from the doc
// comments of lib/ops/<op>*.ts. It stands at the end of the page, after a marker; what is above the
// marker is written by hand. --write regenerates, otherwise the pages are checked.
import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = join(dirname(fileURLToPath(import.meta.url)), '..');
const MARKER = '<!-- Generated from the doc comments by scripts/op_docs.mjs --write. -->';

/** A doc comment as one line of Markdown for a table cell. */
function oneLine(comment) {
  return comment
    .replace(/^\s*\/\*\*|\*\/\s*$/g, '')
    .replace(/^\s*\* ?/gm, '')
    .replace(/^- /gm, '· ')
    .replace(/\{@link (\w+)\}/g, '`$1`')
    .replace(/\s+/g, ' ')
    .replaceAll('|', '\\|')
    .trim();
}

/** Fields of an interface body: name, whether it may be left out, doc comment. */
function fields(body) {
  const found = [];
  let comment = '';
  // At depth 1 a line is part of a comment, a field, or the tail of a field's type.
  for (const part of body.matchAll(/^ {2}\/\*\*[\s\S]*?\*\/|^ {2}(?:readonly )?(\w+)(\??):/gm)) {
    if (part[1] === undefined) {
      comment = part[0];
      continue;
    }
    // Fields that follow each other under one comment share it ("Defaults 2 and 3").
    found.push({ name: part[1], optional: part[2] === '?', text: oneLine(comment) });
  }
  return found;
}

function reference(op) {
  const sections = [];
  const sources = readdirSync(join(root, 'lib/ops'))
    .filter((name) => name === `${op}.ts` || (name.startsWith(`${op}_`) && name.endsWith('.ts')))
    .sort();
  for (const source of sources) {
    const text = readFileSync(join(root, 'lib/ops', source), 'utf8');
    const pattern =
      /((?:\/\*\*(?:(?!\*\/)[\s\S])*\*\/\n)?)export interface (\w+)([^{]*)\{\n([\s\S]*?)\n\}/g;
    for (const [, comment, name, heritage, body] of text.matchAll(pattern)) {
      if (!/(Inputs?|Options|Transform|Upstream|Rejection)$/.test(name)) continue;
      const rows = fields(body);
      if (rows.length === 0) continue;
      const parents = [...heritage.matchAll(/\b([A-Z]\w{3,})\b/g)]
        .map((match) => match[1])
        .filter((parent) => parent !== 'Omit' && parent !== 'Input');
      sections.push(
        `### ${name}`,
        '',
        ...(comment === '' ? [] : [oneLine(comment), '']),
        ...(parents.length === 0
          ? []
          : [
              `And the fields of ${[...new Set(parents)].map((parent) => `\`${parent}\``).join(', ')}.`,
              '',
            ]),
        '| field | |',
        '|---|---|',
        ...rows.map((row) => `| \`${row.name}${row.optional ? '?' : ''}\` | ${row.text} |`),
        '',
      );
    }
  }
  return [MARKER, '', '## Reference', '', ...sections].join('\n').trimEnd();
}

const problems = [];
for (const file of readdirSync(join(root, 'docs/ops')).sort()) {
  const path = join(root, 'docs/ops', file);
  const page = readFileSync(path, 'utf8');
  const written = page.split(MARKER)[0]?.trimEnd();
  const whole = `${written}\n\n${reference(file.replace('.md', ''))}\n`;
  if (whole === page) continue;
  if (process.argv.includes('--write')) writeFileSync(path, whole);
  else problems.push(`docs/ops/${file} is out of date: node scripts/op_docs.mjs --write`);
}
for (const problem of problems) console.error(`✗ ${problem}`);
if (problems.length > 0) process.exit(1);
console.log('op pages: up to date');
