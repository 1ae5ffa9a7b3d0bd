# A loop of Ruby's async under the workloads of asyncio_prober.py, which prints the same. Its timers are tasks that were
# all put to sleep before the loop first waits, each until another instant.

require "async"
require "json"

SECONDS = 6
TIMERS = 2000
NAP = 0.010
WORKLOAD, LEAD = ARGV[0], ARGV[1].to_f
late, overslept = [], []

def now
  Process.clock_gettime(Process::CLOCK_MONOTONIC)
end

def work(seconds)
  finish = now + seconds
  nil while now < finish
end

# In an ordinary task it would only let the loop go on.
def block(seconds)
  Fiber.new(blocking: true) { sleep(seconds) }.resume
end

# Work is begun by the next round, after all timers of this one: behind work of the same round the prober would measure
# the loop's queue beside its lag.
def load(reactor, task)
  loop do
    reactor.yield
    case WORKLOAD
    when "idle"
      task.sleep(1)
    when "short"
      work(0.002)
      task.sleep(0.006)
    when "rare"
      block(0.2)
      task.sleep(0.8)
    else
      work(0.010)
    end
  end
end

$stdin.gets
# A pause between asking the time and falling asleep would look like lateness.
GC.disable
reactor = Async::Reactor.new
start, stretch = now + LEAD, SECONDS.to_f / TIMERS
TIMERS.times do |number|
  due = start + (number + rand) * stretch
  reactor.async do |task|
    task.sleep(due - now)
    late << now - due
  end
end
GC.enable
reactor.async do |task|
  task.sleep(start - now)
  reactor.async do |task|
    loop do
      due = now + NAP
      task.sleep(NAP)
      overslept << now - due
    end
  end
  reactor.async { |task| load(reactor, task) }
  task.sleep(start + SECONDS - now)
  reactor.interrupt
end
# Before the loop first waits: until then it is not late, for it is no loop yet. Fails where that took too long.
sleep(start - now - 0.050)
reactor.run
puts JSON.generate({ timers: late, sleeper: overslept })
# The tasks that are left are nobody's any more.
$stdout.flush
exit!(0)
