# What Open OnDemand's dashboard does with a Batch Connect app, as far as slurm/ondemand/ can tell the difference.
#
#     ruby tests/slurm/ondemand.rb form APP                    the form's attributes, as JSON
#     ruby tests/slurm/ondemand.rb stage APP FOLDER < CHOICES  render, stage into FOLDER; sbatch's arguments, as JSON
#     ruby tests/slurm/ondemand.rb view APP FOLDER             the page of a running session, from FOLDER/connection.yml
#
# CHOICES is a JSON object: what the user typed, by attribute; the rest keeps the form's value. Facts from the sources of
# OSC/ondemand (models/batch_connect/{app,session}.rb) and OSC/ood_core (batch_connect/template.rb, adapters/slurm.rb).
require "erb"
require "fileutils"
require "json"
require "ostruct"
require "pathname"
require "yaml"

module OodAppkit # the clusters that the portal knows
  def self.clusters = ENV.fetch("CLUSTERS", "").split.map { |id| OpenStruct.new(id: id.to_sym) }
end

TemplateBinding = Struct.new(:session, :context) do
  def get_binding = binding
end

# The choices in a template: attributes are methods, and it is Enumerable, so that `partition` would be Ruby's own.
class Context
  include Enumerable

  def initialize(values) = @values = values
  def each(&block) = @values.each(&block)
  def respond_to_missing?(name, *) = @values.key?(name)
  def method_missing(name, *) = @values.fetch(name) { super }
end

def render(path, where)
  erb = ERB.new(path.read, trim_mode: "-")
  erb.filename = path.to_s
  erb.result(where)
end

def form(app) = YAML.safe_load(render(app.join("form.yml.erb"), TOPLEVEL_BINDING))

# A `widget` is shown, anything else is fixed; a browser sends every value as text.
def choices(app, typed)
  shown = form(app)
  values = shown["form"].to_h do |name|
    attribute = shown["attributes"][name]
    first = attribute.is_a?(Hash) ? attribute["value"] || attribute["options"]&.first&.last : attribute
    [name.to_sym, first.to_s]
  end
  values.merge(typed.transform_keys(&:to_sym).transform_values(&:to_s))
end

def submit(app, values)
  YAML.safe_load(render(app.join("submit.yml.erb"), OpenStruct.new(values).instance_eval { binding }))
end

def stage(app, folder, values)
  FileUtils.cp_r("#{app.join("template")}/.", folder, preserve: true)
  folder.glob("**/*.erb").each do |file|
    text = render(file, TemplateBinding.new(OpenStruct.new(id: "0"), Context.new(values)).get_binding)
    file.rename(file.sub_ext("")) # keeps the mode
    file.sub_ext("").write(text)
  end
end

# The `basic` template: helpers, before, script in the background, after, connection file, wait.
def batch(folder)
  <<~BASH
    #!/bin/bash
    cd #{folder}
    export host
    export port
    create_yml () {
      echo "Generating connection YAML file..."
      ( umask 077; echo -e "host: $host\\nport: $port\\npassword: $password" > "#{folder}/connection.yml" )
    }
    clean_up () {
      echo "Cleaning up..."
      [[ -e "#{folder}/clean.sh" ]] && source "#{folder}/clean.sh"
      [[ ${SCRIPT_PID} ]] && pkill -P ${SCRIPT_PID} || :
      pkill -P $$
      exit ${1:-0}
    }
    port_used () { (: < "/dev/tcp/${1%:*}/${1#*:}") 2> /dev/null; }
    find_port () {
      local port=$(shuf -i 2000-65535 -n 1)
      while port_used "${1:-localhost}:${port}"; do port=$(shuf -i 2000-65535 -n 1); done
      echo "${port}"
    }
    create_passwd () { tr -cd '[:alnum:]' < /dev/urandom 2> /dev/null | head -c${1:-32}; }
    export -f port_used find_port create_passwd
    host=$(hostname)
    [[ -e "#{folder}/before.sh" ]] && source "#{folder}/before.sh"
    echo "Script starting..."
    "#{folder}/script.sh" &
    SCRIPT_PID=$!
    [[ -e "#{folder}/after.sh" ]] && source "#{folder}/after.sh"
    create_yml
    wait ${SCRIPT_PID} || clean_up 1
    clean_up
  BASH
end

def arguments(script, folder)
  time = script.fetch("wall_time")
  ["-D", folder.to_s, "-o", folder.join("output.log").to_s, "-p", script.fetch("queue_name"),
   "-t", format("%02d:%02d:%02d", time / 3600, time / 60 % 60, time % 60), *script.fetch("native")]
end

verb, app, folder = ARGV[0], Pathname.new(ARGV[1]), ARGV[2] && Pathname.new(ARGV[2])
case verb
when "form" then puts form(app).to_json
when "stage"
  values = choices(app, JSON.parse($stdin.read))
  begin
    options = submit(app, values)
  rescue ArgumentError => error # the dashboard shows it above the form
    abort error.message
  end
  abort "no basic template" unless options["batch_connect"] == { "template" => "basic" }
  stage(app, folder, values)
  folder.join("job_script_content.sh").write(batch(folder))
  puts arguments(options.fetch("script"), folder).to_json
when "view"
  connect = OpenStruct.new(YAML.safe_load(folder.join("connection.yml").read))
  puts ERB.new(app.join("view.html.erb").read, trim_mode: "-").result(connect.instance_eval { binding })
end
